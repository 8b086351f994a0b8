"""How well a model matches patches and registers images, alongside baselines on the same data."""
