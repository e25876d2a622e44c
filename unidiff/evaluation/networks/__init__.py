"""Networks from pictures to features, which distances between sets of pictures are taken in; `NETWORKS` in `base` finds named ones."""
