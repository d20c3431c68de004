"""HTTP without any domain object: templates, sign-in, errors, limits."""
