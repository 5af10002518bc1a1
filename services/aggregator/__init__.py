"""Runs plans: asks the planned experts at once, lines their answers up, and combines them; passes texts on."""
