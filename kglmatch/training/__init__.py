"""Training of KGL-Net. Optional: `pip install "kglmatch[train]"`; inference never imports it."""
