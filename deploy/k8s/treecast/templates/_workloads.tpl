{{/*
Everything that runs treecast, as a list under `items`: the templates of pods, budgets and scaling
walk it. Each has role, component, name, port, kind and apiVersion of its controller, and cfg: its
values with the defaults of all pods, and for a speculator those of all speculators, merged in.
*/}}
{{- define "treecast.workloads" -}}
{{- $full := include "treecast.fullname" . -}}
{{- $group := gt (int .Values.verifier.hosts) 1 -}}
items:
  - role: router
    component: router
    name: {{ $full }}-router
    port: 7070
    kind: Deployment
    apiVersion: apps/v1
    cfg: {{- include "treecast.merged" (list .Values.router (dict "pod" .Values.pod)) | nindent 6 }}
  - role: verifier
    component: verifier
    name: {{ $full }}-verifier
    port: 7071
    kind: {{ $group | ternary "LeaderWorkerSet" "StatefulSet" }}
    apiVersion: {{ $group | ternary "leaderworkerset.x-k8s.io/v1" "apps/v1" }}
    cfg: {{- include "treecast.merged" (list .Values.verifier (dict "pod" .Values.pod)) | nindent 6 }}
  {{- range .Values.speculators }}
  - role: speculator
    component: speculator
    speculator: {{ .name }}
    name: {{ $full }}-speculator-{{ .name }}
    port: 7072
    kind: Deployment
    apiVersion: apps/v1
    cfg: {{- include "treecast.merged" (list . $.Values.speculatorDefaults (dict "pod" $.Values.pod)) | nindent 6 }}
  {{- end }}
{{- end -}}

{{/* A list of maps as one: those before win over those behind, by 0, false and "" too, which
     `merge` would take for nothing. */}}
{{- define "treecast.merged" -}}
{{- $all := dict -}}
{{- range reverse . }}{{ $all = mergeOverwrite $all (deepCopy .) }}{{ end -}}
{{- toYaml $all -}}
{{- end -}}

{{/* Whether a workload reads a model folder: "yes" or empty. */}}
{{- define "treecast.readsModel" -}}
{{- if eq .role "verifier" }}yes{{ end -}}
{{- if eq .role "speculator" }}{{ range .cfg.drafters }}{{ if hasPrefix "ssm" . }}yes{{ end }}{{ end }}{{ end -}}
{{- end -}}

{{/* Ranks that divide each layer: as told, or what the group's GPUs and its stages leave. */}}
{{- define "treecast.tensorParallel" -}}
{{- $cfg := .Values.verifier -}}
{{- default (div (mul (max 1 (int $cfg.gpus)) (int $cfg.hosts)) (int $cfg.pipelineParallel)) $cfg.tensorParallel -}}
{{- end -}}

{{/* Processes of a group on all its hosts. */}}
{{- define "treecast.ranks" -}}
{{- mul (int (include "treecast.tensorParallel" .)) (int .Values.verifier.pipelineParallel) -}}
{{- end -}}

{{/* Seconds from SIGTERM's forerunner to SIGKILL: more than the drain needs. */}}
{{- define "treecast.graceSeconds" -}}
{{- add (int .preStopSeconds) (int .drainSeconds) 15 -}}
{{- end -}}
