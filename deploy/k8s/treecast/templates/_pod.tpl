{{/* The "restricted" Pod Security Standard, and more: no writable root, no token. */}}
{{- define "treecast.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "treecast.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}

{{/* A question to the process. Takes tls, port and what: live or ready. Kubelets speak gRPC
     without TLS only, so with TLS they ask the listener of /metrics. */}}
{{- define "treecast.question" -}}
{{- if .tls }}
httpGet: {path: /{{ .what }}, port: metrics}
{{- else }}
grpc: {port: {{ .port }}{{ if eq .what "live" }}, service: live{{ end }}}
{{- end }}
{{- end -}}

{{- define "treecast.probes" -}}
{{- $live := include "treecast.question" (dict "tls" .root.Values.tls.enabled "port" .workload.port "what" "live") -}}
{{- $ready := include "treecast.question" (dict "tls" .root.Values.tls.enabled "port" .workload.port "what" "ready") -}}
startupProbe:
  {{- $live | nindent 2 }}
  periodSeconds: 5
  timeoutSeconds: 3
  failureThreshold: {{ add 1 (div (int .workload.cfg.startupSeconds) 5) }}
livenessProbe:
  {{- $live | nindent 2 }}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 3
readinessProbe:
  {{- $ready | nindent 2 }}
  periodSeconds: 5
  timeoutSeconds: 3
  failureThreshold: 2
{{- end -}}

{{/* Requests and limits, with the GPUs. */}}
{{- define "treecast.resources" -}}
{{- $resources := deepCopy .resources -}}
{{- if gt (int .gpus) 0 }}
{{- $_ := set $resources.limits "nvidia.com/gpu" (int .gpus) }}
{{- end }}
{{- toYaml $resources -}}
{{- end -}}

{{- define "treecast.priority" -}}
{{- $own := .workload.cfg.pod.priorityClassName -}}
{{- $made := printf "%s-%s" (include "treecast.fullname" .root) (eq .workload.role "speculator" | ternary "drafting" "serving") -}}
{{- default (.root.Values.priorityClasses.create | ternary $made "") $own -}}
{{- end -}}

{{/* Where a pod runs. Takes root and workload. */}}
{{- define "treecast.scheduling" -}}
{{- $pod := .workload.cfg.pod -}}
{{- with include "treecast.priority" . }}
priorityClassName: {{ . }}
{{- end }}
{{- with $pod.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with $pod.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $pod.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $pod.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- if ne .workload.kind "LeaderWorkerSet" }}
topologySpreadConstraints:
  {{- $labels := include "treecast.selectorLabels" (merge (dict "root" .root) .workload) }}
  {{- range $pod.topologyKeys }}
  - topologyKey: {{ . }}
    maxSkew: 1
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels: {{- $labels | nindent 8 }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* Files that a treecast container mounts besides its model. Takes root and workload. */}}
{{- define "treecast.fileVolumes" -}}
- name: tmp
  emptyDir: {sizeLimit: 2Gi}
{{- if .root.Values.tls.enabled }}
- name: tls
  secret: {secretName: {{ include "treecast.tlsSecret" (dict "root" .root "role" .workload.role) }}, defaultMode: 0440}
{{- end }}
{{- if and (eq .workload.role "router") .root.Values.apiKeys.secretName }}
- name: api-keys
  secret: {secretName: {{ .root.Values.apiKeys.secretName }}, defaultMode: 0440}
{{- end }}
{{- if gt (int .workload.cfg.gpus) 0 }}
- name: shm
  emptyDir: {medium: Memory, sizeLimit: {{ .workload.cfg.sharedMemory }}}
{{- end }}
{{- end -}}

{{- define "treecast.mounts" -}}
- {name: tmp, mountPath: /tmp}
{{- if include "treecast.readsModel" .workload }}
- {name: models, mountPath: /models, readOnly: true}
{{- end }}
{{- if .root.Values.tls.enabled }}
- {name: tls, mountPath: /etc/treecast/tls, readOnly: true}
{{- end }}
{{- if and (eq .workload.role "router") .root.Values.apiKeys.secretName }}
- {name: api-keys, mountPath: /etc/treecast/api-keys, readOnly: true}
{{- end }}
{{- if gt (int .workload.cfg.gpus) 0 }}
- {name: shm, mountPath: /dev/shm}
{{- end }}
{{- end -}}

{{/* The container that runs a workload. Takes root, workload and, for the followers of a sharded
     group, follower: they serve nobody, so nobody probes them. */}}
{{- define "treecast.container" -}}
{{- $w := .workload -}}
name: {{ $w.role }}
image: {{ include "treecast.image" (dict "root" .root "role" $w.role "gpus" $w.cfg.gpus) }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
{{- if eq $w.kind "LeaderWorkerSet" }}
command: [python, -m, torch.distributed.run]
args:
  - --nnodes=$(LWS_GROUP_SIZE)
  - --node-rank=$(LWS_WORKER_INDEX)
  - --nproc-per-node={{ div (int (include "treecast.ranks" .root)) (int $w.cfg.hosts) }}
  - --master-addr=$(LWS_LEADER_ADDRESS)
  - --master-port=29500
  - --shutdown-timeout={{ add (int $w.cfg.drainSeconds) 5 }}
  - --module
  - treecast.services.verifier
{{- else }}
args:
{{- end }}
  {{- include "treecast.flags" . | nindent 2 }}
env:
  {{- include "treecast.env" . | nindent 2 }}
{{- if not .follower }}
ports:
  - {name: grpc, containerPort: {{ $w.port }}}
  - {name: metrics, containerPort: 9090}
  {{- if and (eq $w.role "router") $w.cfg.http.enabled }}
  - {name: http, containerPort: 8080}
  {{- end }}
{{- include "treecast.probes" . | nindent 0 }}
{{- end }}
lifecycle:
  preStop:
    sleep: {seconds: {{ $w.cfg.preStopSeconds }}}
resources: {{- include "treecast.resources" $w.cfg | nindent 2 }}
securityContext: {{- include "treecast.containerSecurity" . | nindent 2 }}
volumeMounts: {{- include "treecast.mounts" . | nindent 2 }}
{{- end -}}

{{/* A pod template. Takes root, workload and, perhaps, follower. */}}
{{- define "treecast.podTemplate" -}}
{{- $w := .workload -}}
{{- $component := ternary "verifier-follower" $w.component (default false .follower) -}}
metadata:
  labels:
    {{- include "treecast.labels" (merge (dict "root" .root "component" $component) $w) | nindent 4 }}
    {{- with $w.cfg.pod.labels }}{{ toYaml . | nindent 4 }}{{ end }}
  {{- with $w.cfg.pod.annotations }}
  annotations: {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  serviceAccountName: {{ include "treecast.serviceAccount" .root }}
  automountServiceAccountToken: false
  enableServiceLinks: false # they would be read as settings: TREECAST_...
  terminationGracePeriodSeconds: {{ include "treecast.graceSeconds" $w.cfg }}
  securityContext: {{- include "treecast.podSecurity" . | nindent 4 }}
  {{- with .root.Values.image.pullSecrets }}
  imagePullSecrets: {{- range . }}
    - name: {{ . }}
  {{- end }}
  {{- end }}
  {{- include "treecast.scheduling" . | nindent 2 }}
  {{- if and (include "treecast.readsModel" $w) (ne $w.cfg.model.source "pvc") }}
  initContainers:
    {{- include "treecast.modelInit" . | nindent 4 }}
  {{- end }}
  containers:
    - {{- include "treecast.container" . | nindent 6 }}
  volumes:
    {{- include "treecast.fileVolumes" . | nindent 4 }}
    {{- if include "treecast.readsModel" $w }}
    {{- include "treecast.modelVolume" $w.cfg.model | nindent 4 }}
    {{- end }}
{{- end -}}
