{{/* What --model is given. Takes the workload's model. */}}
{{- define "treecast.modelFolder" -}}
{{- if eq .source "package" }}default{{ else }}{{ printf "/models/%s" .folder | trimSuffix "/" }}{{ end -}}
{{- end -}}

{{/* The volume that is mounted at /models. */}}
{{- define "treecast.modelVolume" -}}
- name: models
{{- if eq .source "pvc" }}
  persistentVolumeClaim:
    claimName: {{ .pvc.claimName }}
    readOnly: true
{{- else }}
  emptyDir:
    sizeLimit: {{ .sizeLimit }}
{{- end }}
{{- end -}}

{{/* What fills it before the service starts. Takes root and workload. */}}
{{- define "treecast.modelInit" -}}
{{- $model := .workload.cfg.model -}}
- name: model
{{- if eq $model.source "package" }}
  image: {{ include "treecast.image" (dict "root" .root "role" .workload.role "gpus" .workload.cfg.gpus) }}
  command: [treecast, models]
{{- else if eq $model.source "image" }}
  image: {{ $model.image.reference }}
  command: [cp, -R, {{ printf "%s/." (trimSuffix "/" $model.image.path) }}, /models/]
{{- else }}
  image: {{ $model.objectStore.image }}
  args: [copy, {{ printf "store:%s" $model.objectStore.path }}, /models/{{ $model.folder }}]
{{- end }}
  imagePullPolicy: {{ .root.Values.image.pullPolicy }}
  env:
    - {name: HOME, value: /tmp}
    - {name: TREECAST_HOME, value: /models}
    {{- range $name, $value := eq $model.source "objectStore" | ternary $model.objectStore.remote dict }}
    - name: RCLONE_CONFIG_STORE_{{ upper $name }}
      value: {{ $value | quote }}
    {{- end }}
  {{- if and (eq $model.source "objectStore") $model.objectStore.secretName }}
  envFrom:
    - secretRef: {name: {{ $model.objectStore.secretName }}}
  {{- end }}
  resources: {{- toYaml $model.initResources | nindent 4 }}
  securityContext: {{- include "treecast.containerSecurity" . | nindent 4 }}
  volumeMounts:
    - {name: models, mountPath: /models}
    - {name: tmp, mountPath: /tmp}
{{- end -}}
