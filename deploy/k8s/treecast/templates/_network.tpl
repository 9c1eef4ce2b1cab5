{{/* Pods of one component of this release, as a peer. Takes root and component. */}}
{{- define "treecast.peer" -}}
podSelector:
  matchLabels: {{- include "treecast.selectorLabels" . | nindent 4 }}
{{- end -}}

{{/* A policy's head, up to its rules. Takes root and component. */}}
{{- define "treecast.policy" -}}
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  {{- include "treecast.metadata" (merge (dict "name" (printf "%s-%s" (include "treecast.fullname" .root) .component)) .) | nindent 2 }}
spec:
  podSelector:
    matchLabels: {{- include "treecast.selectorLabels" . | nindent 6 }}
  policyTypes: [Ingress, Egress]
{{- end -}}

{{- define "treecast.ingressOfMetrics" -}}
- from: {{- toYaml .Values.networkPolicy.prometheus | nindent 4 }}
  ports: [{port: 9090}]
{{- end -}}

{{/* Where every treecast process may go: names, Redis, traces. */}}
{{- define "treecast.egressOfAll" -}}
- ports: [{port: 53, protocol: UDP}, {port: 53, protocol: TCP}]
{{- if eq .Values.redis.mode "bundled" }}
- to:
    - {{- include "treecast.peer" (dict "root" . "component" "redis") | nindent 6 }}
  ports: [{port: 6379}]
{{- else if eq .Values.redis.mode "external" }}
- ports: [{port: {{ .Values.redis.external.port }}}]
{{- end }}
{{- with .Values.tracing.otlpEndpoint }}
- ports: [{port: {{ regexFind ":[0-9]+$" . | trimPrefix ":" | default "4317" }}}]
{{- end }}
{{- with .Values.networkPolicy.extraEgress }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Where an init container fetches the model from. Takes a list of models. */}}
{{- define "treecast.egressOfModels" -}}
{{- $fetched := false -}}
{{- range . }}{{ if has .source (list "package" "objectStore") }}{{ $fetched = true }}{{ end }}{{ end -}}
{{- if $fetched }}
- ports: [{port: 443}]
{{- end }}
{{- end -}}
