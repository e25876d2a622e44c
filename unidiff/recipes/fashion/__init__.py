"""Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747): 70,000 photographs of clothes, shoes and bags, see `docs/photographs.md`."""
