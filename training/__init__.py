"""What makes experts: it needs torch and its own extra (`pip install 'hocket[training]'`), and never serves."""
