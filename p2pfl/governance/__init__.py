"""Agreements between institutions: identities, cards, studies and the result contract."""
