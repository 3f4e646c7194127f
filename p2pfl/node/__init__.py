"""The daemon of one institution: its loops, its checkpoint, its status, its site file."""
