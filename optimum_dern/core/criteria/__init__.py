"""Selection criteria: scores of experts, and the choice of the retained ones under the router's constraints."""
