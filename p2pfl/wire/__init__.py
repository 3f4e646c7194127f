"""Messages over a link, their bytes, and the rules of the conversation, without a socket and without a clock."""
