"""Tables 3 and 4: from balance to samples."""
