{{- define "luthier.name" -}}
{{- if contains "luthier" .Release.Name }}{{ .Release.Name }}{{ else }}{{ printf "%s-luthier" .Release.Name | trunc 40 | trimSuffix "-" }}{{ end -}}
{{- end }}

{{/* Labels of one part: a list of the root and the part's name. */}}
{{- define "luthier.selector" -}}
app.kubernetes.io/name: luthier
app.kubernetes.io/instance: {{ (index . 0).Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{- define "luthier.labels" -}}
{{ include "luthier.selector" . }}
app.kubernetes.io/version: {{ (index . 0).Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ (index . 0).Release.Service }}
{{- end }}

{{/* The environment of every process: what is not secret here, what is from the Secret. */}}
{{- define "luthier.environment" -}}
{{- if and (not .Values.storageUrl) (not .Values.data.existingClaim) }}
{{- fail "Set storageUrl (an object storage), or data.existingClaim (a claim that every pod can mount): pods share no folder." }}
{{- end }}
envFrom:
  - secretRef: {name: {{ .Values.secrets.environment }}}
env:
  - {name: LUTHIER_DATA_DIR, value: /data}
  - {name: LUTHIER_SECRETS_DIR, value: /keys}
  - {name: LUTHIER_HOST, value: 0.0.0.0}
  - {name: LUTHIER_PORT, value: "8000"}
  - {name: LUTHIER_PUBLIC_URL, value: {{ .Values.publicUrl | quote }}}
  - {name: LUTHIER_FORWARDED_ALLOW_IPS, value: {{ .Values.proxies | quote }}}
  - {name: LUTHIER_STOP_GRACE_SECONDS, value: {{ .Values.stopGraceSeconds | quote }}}
  {{- if .Values.storageUrl }}
  - {name: LUTHIER_STORAGE_URL, value: {{ .Values.storageUrl | quote }}}
  - {name: LUTHIER_STORAGE_CACHE_BYTES, value: {{ .Values.data.cacheBytes | int64 | quote }}}
  {{- end }}
  {{- range $name, $value := .Values.settings }}
  {{- if regexMatch "PASSWORD|SECRET|DATABASE_URL|REDIS_URL" $name }}
  {{- fail (printf "settings.%s is secret, or is set by the chart: what is secret belongs in the Secret that secrets.environment names." $name) }}
  {{- end }}
  - {name: {{ $name }}, value: {{ $value | quote }}}
  {{- end }}
{{- end }}

{{- define "luthier.mounts" -}}
volumeMounts:
  - {name: data, mountPath: /data}
  - {name: keys, mountPath: /keys, readOnly: true}
  - {name: tmp, mountPath: /tmp}
{{- end }}

{{- define "luthier.volumes" -}}
- name: data
  {{- if .Values.storageUrl }}
  emptyDir: {sizeLimit: {{ .Values.data.size }}}
  {{- else }}
  persistentVolumeClaim: {claimName: {{ .Values.data.existingClaim }}}
  {{- end }}
- name: keys
  secret: {secretName: {{ .Values.secrets.keys }}, defaultMode: 0440}
- name: tmp
  emptyDir: {}
{{- end }}

{{/* What every pod is: an ordinary user without capabilities. Landlock and seccomp confine the jobs in it. */}}
{{- define "luthier.pod" -}}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 1000
  runAsGroup: 1000
  fsGroup: 1000
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- with .Values.images.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end }}

{{- define "luthier.walls" -}}
securityContext:
  allowPrivilegeEscalation: false
  capabilities: {drop: [ALL]}
{{- end }}

{{- define "luthier.placing" -}}
{{- with .nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
