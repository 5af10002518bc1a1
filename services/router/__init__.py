"""What clients call: weighs the experts of a model for each request, plans, and relays the answer."""
