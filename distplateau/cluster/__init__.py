"""Getting a run onto the machines of a cluster, and back there when it was interrupted."""
