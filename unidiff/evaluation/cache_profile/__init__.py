"""How much features change between passes, and which cache that suits."""
