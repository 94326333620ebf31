"""What people read: text, templates, figures, and one style for all of them."""
