"""A federation whose nodes are real: each a site with its own data on its own machine, and nodes that fail.

On the nodes: :mod:`.site` is a site's workbench, :mod:`.kept` what it keeps on its disk. On the server: :mod:`.grid` is
the way to nodes that may be gone, :mod:`.roster` knows who they are, :mod:`.server` serves them without any data.
:mod:`.submit` hands a run to a running SuperLink, and :mod:`.folder` writes all that is needed to start one.

What travels is what :mod:`fednorm.federation.client` says, and beside every message to a site a record
``fednorm.site``: which client the site is, which run it is, and the last round of which the server used its training.
"""
