"""What coordinator and site exchange, and how it is encoded."""
