"""HTTP, without any noun: templates, sign-in, errors, limits."""
