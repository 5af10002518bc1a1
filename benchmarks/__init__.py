"""Speed, measured: both sides in one run, printed as ratios, with the floor beside them."""
