"""How fast it all is: `python -m vaebal.bench`, see `vaebal/bench/__main__.py`."""
