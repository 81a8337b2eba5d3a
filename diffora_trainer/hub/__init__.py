"""What goes to the Hub: card, picture, and copies without secrets."""
