"""Search over answers and the numbers of active experts that write them (Dynamic Experts Search, arXiv 2509.22572)."""
