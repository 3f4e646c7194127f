"""Decisions of a node about its neighbours, without input or output: edges, deadlines, paces, the view of the network."""
