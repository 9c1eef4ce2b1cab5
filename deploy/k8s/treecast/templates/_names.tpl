{{/* A name short enough that every suffix of the chart fits into 63 characters. */}}
{{- define "treecast.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- $full := ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) -}}
{{- default $full .Values.fullnameOverride | trunc 30 | trimSuffix "-" -}}
{{- end -}}

{{/* Labels that never change, which selectors use. Takes root, component and, for one of several
     speculators, speculator. */}}
{{- define "treecast.selectorLabels" -}}
app.kubernetes.io/name: {{ .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
{{- with .component }}
app.kubernetes.io/component: {{ . }}
{{- end }}
{{- with .speculator }}
treecast/speculator: {{ . }}
{{- end }}
{{- end -}}

{{- define "treecast.labels" -}}
{{ include "treecast.selectorLabels" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end -}}

{{/* name and labels of an object. Takes root, name and what labels take. */}}
{{- define "treecast.metadata" -}}
name: {{ .name }}
namespace: {{ .root.Release.Namespace }}
labels:
  {{- include "treecast.labels" . | nindent 2 }}
{{- end -}}

{{/* Takes root, role and gpus: the router has no variants. */}}
{{- define "treecast.image" -}}
{{- $image := .root.Values.image -}}
{{- $tag := default .root.Chart.AppVersion $image.tag -}}
{{- $variant := eq .role "router" | ternary "" (gt (int .gpus) 0 | ternary "-cuda" "-cpu") -}}
{{- with $image.registry }}{{ trimSuffix "/" . }}/{{ end }}treecast-{{ .role }}:{{ $tag }}{{ $variant -}}
{{- end -}}

{{- define "treecast.serviceAccount" -}}
{{- default (include "treecast.fullname" .) .Values.serviceAccount.name -}}
{{- end -}}
