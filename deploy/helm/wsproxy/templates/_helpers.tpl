{{- define "wsproxy.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "wsproxy.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride }}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" }}
{{- else if contains $name .Release.Name }}
{{- .Release.Name | trunc 63 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name $name | trunc 63 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "wsproxy.selectorLabels" -}}
app.kubernetes.io/name: {{ include "wsproxy.name" . }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end }}

{{- define "wsproxy.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{ include "wsproxy.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "wsproxy.image" -}}
{{- with .Values.image }}
{{- if .registry }}{{ .registry }}/{{ end }}{{ .repository }}:{{ default $.Chart.AppVersion .tag }}
{{- end }}
{{- end }}

{{- define "wsproxy.secretName" -}}
{{- default (include "wsproxy.fullname" .) .Values.existingSecret }}
{{- end }}

{{- define "wsproxy.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "wsproxy.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- /* A Service of its own, so that a load balancer in front of the clients' one does not publish the port. */}}
{{- define "wsproxy.adminServiceName" -}}
{{- include "wsproxy.fullname" . | trunc 57 | trimSuffix "-" }}-admin
{{- end }}

{{- /* The name of the port that serves /metrics, in pods and Services. */}}
{{- define "wsproxy.metricsPort" -}}
{{- if .Values.metrics.adminPort }}admin{{ else }}http{{ end }}
{{- end }}

{{- /* preStop, the drain, and a margin for the process to end. */}}
{{- define "wsproxy.terminationGracePeriodSeconds" -}}
{{- add .Values.preStopSeconds (get .Values.env "SHUTDOWN_GRACE_PERIOD_SECS" | toString | default "30" | int) 10 }}
{{- end }}

{{- /* One that podAnnotations names wins. A change of the values of `secret` rolls the pods. */}}
{{- define "wsproxy.podAnnotations" -}}
{{- $annotations := dict }}
{{- if not .Values.metrics.serviceMonitor.enabled }}
{{- $port := default 8080 .Values.metrics.adminPort | toString }}
{{- $annotations = dict "prometheus.io/scrape" "true" "prometheus.io/port" $port "prometheus.io/path" "/metrics" }}
{{- end }}
{{- if not .Values.existingSecret }}
{{- $_ := set $annotations "checksum/secret" (toJson .Values.secret | sha256sum) }}
{{- end }}
{{- with merge (deepCopy .Values.podAnnotations) $annotations }}
{{- toYaml . }}
{{- end }}
{{- end }}

{{- /* What a schema cannot say, or not as a sentence; and no schema's message may show a secret. */}}
{{- define "wsproxy.check" -}}
{{- $secret := .Values.secret }}
{{- if and .Values.existingSecret (or $secret.jwtSecret $secret.jwtSecretPrevious $secret.redisUrl $secret.adminPassword) }}
{{- fail "existingSecret and the values of secret exclude each other: give one of them" }}
{{- end }}
{{- if not (or .Values.existingSecret (and $secret.jwtSecret $secret.redisUrl)) }}
{{- fail (print "A secret is missing: set existingSecret to the name of a Secret with JWT_SECRET and REDIS_URL, "
  "or set secret.jwtSecret and secret.redisUrl") }}
{{- end }}
{{- range $name := list "jwtSecret" "jwtSecretPrevious" }}
{{- $value := get $secret $name }}
{{- if and $value (lt (len $value) 32) }}
{{- fail (printf "secret.%s must be 32 bytes or more: make one with \"openssl rand -hex 32\"" $name) }}
{{- end }}
{{- end }}
{{- if and $secret.adminPassword (lt (len $secret.adminPassword) 12) }}
{{- fail "secret.adminPassword must be 12 bytes or more" }}
{{- end }}
{{- if eq (int .Values.metrics.adminPort) 8080 }}
{{- fail "metrics.adminPort must be another port than 8080, where clients are served" }}
{{- end }}
{{- if .Values.ingress.enabled }}
{{- if not .Values.ingress.hosts }}
{{- fail "ingress.hosts must name a host and the paths of your agents, such as /my-agent/" }}
{{- end }}
{{- range .Values.ingress.hosts }}
{{- range .paths }}
{{- if and (not $.Values.metrics.adminPort) (has (trimSuffix "/" .path) (list "" "/metrics")) }}
{{- fail (print "The ingress path " (quote .path) " would publish /metrics: name the prefixes of your agents, "
  "such as /my-agent/, or set metrics.adminPort") }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
