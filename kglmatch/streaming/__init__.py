"""Many pairs in, many results out: images are read ahead in other processes while the network runs."""
