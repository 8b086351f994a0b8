"""Registration of whole images: structure proposes a transform, the network judges it."""
