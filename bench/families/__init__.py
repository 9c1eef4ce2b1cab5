"""Every family of causal LMs that is served, checked against transformers itself."""
