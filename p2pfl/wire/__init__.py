"""What goes over a link: messages, their bytes, and the rules of the conversation, without a socket and without a clock."""
