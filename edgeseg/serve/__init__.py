"""The web page of a run: live pictures, figures and recordings, for a browser.

`WebPage` is what a program uses. `address` has the grammar of where it listens, `access` the rules
of who may ask, `feed` the way from the pipeline's thread to the page's, `broadcast` the pictures
that all viewers share, `site` the addresses, and index.html, style.css and app.js the page itself,
which loads nothing from elsewhere.
"""

from edgeseg.serve.page import WebPage

__all__ = ["WebPage"]
