{{/* One flag for each entry of a map of settings. Numbers go through JSON: YAML's own way of
     writing 1000000 is 1e+06. */}}
{{- define "treecast.settings" -}}
{{- range $name, $value := . }}
{{- if kindIs "bool" $value }}
- --{{ $value | ternary "" "no-" }}{{ $name }}
{{- else if kindIs "slice" $value }}
- {{ printf "--%s=%s" $name (join "," $value) | quote }}
{{- else }}
- {{ printf "--%s=%s" $name (kindIs "string" $value | ternary $value (toJson $value)) | quote }}
{{- end }}
{{- end }}
{{- end -}}

{{/* Whole cores of a limit such as 4, "2.5" or "1500m": threads of a forward pass. */}}
{{- define "treecast.threads" -}}
{{- $cpu := toString . -}}
{{- $cores := hasSuffix "m" $cpu | ternary (divf (trimSuffix "m" $cpu) 1000) (float64 $cpu) -}}
{{- floor $cores | int | max 1 -}}
{{- end -}}

{{/* The flags of a workload. Takes root and workload. */}}
{{- define "treecast.flags" -}}
{{- $values := .root.Values -}}
{{- $full := include "treecast.fullname" .root -}}
{{- $w := .workload -}}
- --listen={{ $values.listenHost }}:{{ $w.port }}
- --advertise=$(POD_IP):{{ $w.port }}
- --metrics-listen={{ $values.listenHost }}:9090
- --log-level={{ $values.logLevel }}
- --drain-s={{ $w.cfg.drainSeconds }}
{{- if eq $w.role "router" }}
- --verifiers=dns:///{{ $full }}-verifiers:7071
{{- if $w.cfg.http.enabled }}
- --http-listen={{ $values.listenHost }}:8080
{{- end }}
{{- with $values.apiKeys.secretName }}
- --api-keys-file=/etc/treecast/api-keys/{{ $values.apiKeys.key }}
{{- end }}
{{- end }}
{{- if eq $w.role "verifier" }}
{{- if $values.speculators }}
- --speculators=dns:///{{ $full }}-speculators:7072
{{- end }}
{{- if $w.cfg.trustSpeculators }}
- --trusted-speculators=all
{{- end }}
{{- if gt (int (include "treecast.tensorParallel" .root)) 1 }}
- --tp={{ include "treecast.tensorParallel" .root }}
{{- end }}
{{- if gt (int $w.cfg.pipelineParallel) 1 }}
- --pp={{ $w.cfg.pipelineParallel }}
{{- end }}
{{- end }}
{{- if eq $w.role "speculator" }}
- --drafters={{ join "," $w.cfg.drafters }}
{{- end }}
{{- if include "treecast.readsModel" $w }}
- --model={{ include "treecast.modelFolder" $w.cfg.model }}
{{- end }}
{{- if ne $w.role "router" }}
{{- if gt (int $w.cfg.gpus) 0 }}
- --device=cuda
{{- end }}
{{- if not (hasKey $w.cfg.settings "torch-threads") }}
- --torch-threads={{ include "treecast.threads" $w.cfg.resources.limits.cpu }}
{{- end }}
{{- end }}
{{- if $values.tls.enabled }}
- --tls-cert=/etc/treecast/tls/tls.crt
- --tls-key=/etc/treecast/tls/tls.key
- --tls-ca=/etc/treecast/tls/ca.crt
{{- end }}
{{- with $values.tracing.otlpEndpoint }}
- --otlp-endpoint={{ . }}
{{- end }}
{{- include "treecast.settings" $w.cfg.settings }}
{{- end -}}

{{/* Environment of a treecast container. Takes root and workload. */}}
{{- define "treecast.env" -}}
{{- $redis := .root.Values.redis -}}
- name: POD_IP
  valueFrom: {fieldRef: {fieldPath: status.podIP}}
- name: HOME
  value: /tmp
- name: TREECAST_HOME
  value: /models
{{- if eq $redis.mode "bundled" }}
- name: REDIS_PASSWORD
  valueFrom:
    secretKeyRef: {name: {{ include "treecast.redisSecret" .root }}, key: password}
- name: TREECAST_REDIS_URL
  value: redis://:$(REDIS_PASSWORD)@{{ include "treecast.fullname" .root }}-redis:6379/0
{{- else if eq $redis.mode "external" }}
- name: TREECAST_REDIS_URL
  valueFrom:
    secretKeyRef: {name: {{ $redis.external.secretName }}, key: {{ $redis.external.key }}}
{{- end }}
{{- with .workload.cfg.pod.env }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "treecast.redisSecret" -}}
{{- default (printf "%s-redis" (include "treecast.fullname" .)) .Values.redis.bundled.secretName -}}
{{- end -}}
