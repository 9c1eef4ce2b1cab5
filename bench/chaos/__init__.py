"""What is lost per fault: the mesh as processes, under load, hurt in every way, and compared.

`python -m treecast.bench.chaos` (`make chaos`) prints the table.
"""
