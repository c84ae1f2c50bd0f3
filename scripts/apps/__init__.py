"""What the apps are made of: a page, and a studio that draws for one visitor after another."""
