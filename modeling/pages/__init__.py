"""Parts of the HTML pages: words, figures, sentences, pictures."""
