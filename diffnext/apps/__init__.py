"""Pages for the browser, and the studio that draws for one visitor after the other."""
