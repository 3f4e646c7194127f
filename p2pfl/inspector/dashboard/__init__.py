"""A page about runs that renews itself, for a browser on this machine. Needs the extra `dashboard`.

guard.py says who may come in, board.py reads the sources again and again, page.py lays out what they hold, server.py listens.
"""
