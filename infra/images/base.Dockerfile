# Debian 12 with its Python, from the files that debootstrap fetched: for machines that reach no registry.
FROM scratch
ADD base.tar /
