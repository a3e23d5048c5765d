"""The methods of search that come with this package, one module each: what ``search.method`` names."""
