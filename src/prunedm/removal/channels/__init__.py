"""Channel removal: coupled groups of channels, the blocks that go, and the plan that removes them."""
