"""Report runs and benchmarks as one page that is read in a browser, and their plots as files.

``runs`` and ``benchmarks`` read the files; ``comparison``, ``curves``, ``scaling`` and ``cases``
(with ``variables``) choose what is shown of them, as the plain data of ``figures``; ``drawing``
draws the plots by matplotlib, and ``page`` puts everything into the template ``page.html``.
"""
