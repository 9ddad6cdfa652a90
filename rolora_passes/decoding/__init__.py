"""What a runtime needs that feeds tokens a few at a time: state, positions, and caches."""
