"""What would otherwise fail late, or train silently on the wrong thing, is refused before training starts."""
