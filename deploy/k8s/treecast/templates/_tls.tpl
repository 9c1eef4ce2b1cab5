{{/* The secret with tls.crt, tls.key and ca.crt of a role. Takes root and role. */}}
{{- define "treecast.tlsSecret" -}}
{{- $made := printf "%s-%s-tls" (include "treecast.fullname" .root) .role -}}
{{- .root.Values.tls.certManager.enabled | ternary $made (index .root.Values.tls.secretNames .role) -}}
{{- end -}}
