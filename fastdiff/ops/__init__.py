"""Operations with one contract and several implementations: see `registry`."""
