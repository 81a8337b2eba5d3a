"""What goes to the Hub: card, picture, report, and copies without secrets."""
