{{/* Names: the release's, and the chart's where that says less. */}}
{{- define "jaxserve.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 40 | trimSuffix "-" }}{{ else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 40 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "jaxserve.labels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{/* What selects pods: of all engines, of one pool (.pool), or of the gateways. */}}
{{- define "jaxserve.selector" -}}
app.kubernetes.io/name: {{ .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- with .pool }}
jaxserve/pool: {{ . }}
{{- end }}
{{- end }}

{{- define "jaxserve.scraped" -}}
prometheus.io/scrape: "true"
prometheus.io/port: "8000"
prometheus.io/path: /metrics
{{- end }}

{{/* The pod as a whole may do nothing but run as somebody. */}}
{{- define "jaxserve.pod" -}}
# The drain and a margin: then the kubelet kills.
terminationGracePeriodSeconds: {{ add .Values.drainSeconds 15 }}
automountServiceAccountToken: false
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  fsGroup: 10001
  seccompProfile: {type: RuntimeDefault}
{{- with .Values.imagePullSecrets }}
imagePullSecrets: {{ toJson . }}
{{- end }}
{{- end }}

{{- define "jaxserve.container" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end }}

{{/* Flags of an engine's or a gateway's keys. */}}
{{- define "jaxserve.keyArgs" -}}
{{- if .Values.keys.secret }}
- --api-key-file
- /keys/keys
{{- end }}
{{- end }}

{{/* An engine's pod: root, name (of the pool), pool, follows (it is a worker of a group). */}}
{{- define "jaxserve.engine" -}}
{{- $root := .root }}{{ $pool := .pool }}{{ $hosts := int (default 1 $pool.hosts) }}
{{- include "jaxserve.pod" $root }}
{{- range $key := list "nodeSelector" "tolerations" "affinity" }}
{{- with index $pool $key }}
{{ $key }}: {{ toJson . }}
{{- end }}
{{- end }}
containers:
  - name: jaxserve
    image: "{{ $root.Values.image.repository }}:{{ default $root.Values.image.tag $pool.imageTag }}"
    imagePullPolicy: {{ $root.Values.image.pullPolicy }}
    args:
      {{- with $root.Values.model }}
      - --model
      - {{ . | quote }}
      {{- end }}
      {{- with $pool.role }}
      - --role
      - {{ . }}
      {{- end }}
      {{- if and (has $pool.role (list "decode" "both")) (not (has "--kv-transfer-config" (default list $pool.args))) }}
      # Whom it fetches from, the NetworkPolicy says.
      - --kv-transfer-config
      - '{"peers": ["*"]}'
      {{- end }}
      {{- if gt $hosts 1 }}
      - --coordinator
      - auto
      {{- end }}
      {{- include "jaxserve.keyArgs" $root | nindent 6 }}
      - --drain-timeout
      - {{ $root.Values.drainSeconds | quote }}
      {{- range $pool.args }}
      - {{ . | quote }}
      {{- end }}
    {{- if or $pool.env (and $root.Values.keys.proxySecret $pool.role) }}
    env:
      {{- if and $root.Values.keys.proxySecret $pool.role }}
      - name: JAXSERVE_PEER_API_KEY
        valueFrom: {secretKeyRef: {name: {{ $root.Values.keys.proxySecret }}, key: proxy}}
      {{- end }}
      {{- range $pool.env }}
      - {{ toJson . }}
      {{- end }}
    {{- end }}
    {{- if not .follows }}
    ports:
      - {name: grpc, containerPort: 50051}
      - {name: http, containerPort: 8000}
    # Loading and compiling take minutes the first time, seconds from the cache afterwards.
    startupProbe:
      httpGet: {path: /ready, port: http}
      periodSeconds: 5
      failureThreshold: 720
    livenessProbe:
      httpGet: {path: /health, port: http}
      periodSeconds: 10
      timeoutSeconds: 5
    readinessProbe:
      httpGet: {path: /ready, port: http}
      periodSeconds: 5
      timeoutSeconds: 5
    {{- end }}
    resources: {{ toJson (default dict $pool.resources) }}
    {{- include "jaxserve.container" $root | nindent 4 }}
    volumeMounts:
      - {name: cache, mountPath: /cache}
      - {name: tmp, mountPath: /tmp}
      {{- if $root.Values.keys.secret }}
      - {name: keys, mountPath: /keys, readOnly: true}
      {{- end }}
      {{- if gt $hosts 1 }}
      - {name: shm, mountPath: /dev/shm}
      {{- end }}
volumes:
  - name: cache
    persistentVolumeClaim: {claimName: {{ default (printf "%s-cache" (include "jaxserve.name" $root)) $root.Values.cache.existingClaim }}}
  - name: tmp
    emptyDir: {sizeLimit: 2Gi}
  {{- if $root.Values.keys.secret }}
  - name: keys
    secret: {secretName: {{ $root.Values.keys.secret }}, defaultMode: 288}  # 0440: the server's group
  {{- end }}
  {{- if gt $hosts 1 }}
  # Collective libraries pass data between a host's devices through it; the default is 64 MiB.
  - name: shm
    emptyDir: {medium: Memory, sizeLimit: 8Gi}
  {{- end }}
{{- end }}

{{/* What cannot work is said before anything is applied. */}}
{{- define "jaxserve.check" -}}
{{- range $name, $pool := .Values.engines }}
{{- if and $pool.role (gt (int (default 1 $pool.hosts)) 1) }}
{{- fail (printf "engines.%s: engines of several hosts exchange no pages with others; leave its role empty." $name) }}
{{- end }}
{{- end }}
{{- if and .Values.keys.secret .Values.gateway.enabled (not .Values.keys.proxySecret) }}
{{- fail "keys.secret has the engines ask for keys: give keys.proxySecret, with which the gateways come to them." }}
{{- end }}
{{- end }}
