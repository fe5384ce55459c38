"""What workers and servers exchange, and over what: messages, links, encryption, shared memory."""
