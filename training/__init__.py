"""What makes experts: it needs torch and an extra (`pip install -e '.[training]'` in a clone), and never serves."""
