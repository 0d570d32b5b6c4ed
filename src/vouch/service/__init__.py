"""A trained run as an HTTP service with pages. Needs `pip install "vouch[service]"`."""
