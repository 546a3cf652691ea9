"""Which penalties balance."""
